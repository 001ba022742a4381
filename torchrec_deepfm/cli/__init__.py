"""The command line: one thin typed layer over the library."""
