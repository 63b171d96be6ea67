"""The command line: LightningCLI, its arguments and help, what is checked before a run, and how a run ends."""
