from minisrv.tokenizer.process import main

main()
