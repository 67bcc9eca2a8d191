"""A network -> a ChannelGraph; a new op rule goes into rules/. Imports: graph, costs (for the text of print(graph))."""
