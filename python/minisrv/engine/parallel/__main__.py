from minisrv.engine.parallel.process import main

main()
