from minisrv.frontend.process import main

main()
