"""What a reader of the Hub page sees: the card of a model, and what brings a folder there."""
