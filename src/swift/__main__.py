"""`python -m swift` is the command `swift`."""

from swift.cli.main import swift_main

swift_main()
