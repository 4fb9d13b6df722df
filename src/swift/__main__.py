from swift.cli.main import swift_main

swift_main()
