from minisrv.detokenizer.process import main

main()
