def print_help(parser): parser.print_help()
