"""Training routers, adapters and routing tokens with the stock `Trainer`."""
