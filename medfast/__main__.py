from medfast.cli import main

main()
