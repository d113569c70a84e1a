from minisrv.scheduler.process import main

main()
