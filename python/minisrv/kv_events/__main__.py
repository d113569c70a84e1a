from minisrv.kv_events.process import main

main()
