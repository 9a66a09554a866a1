"""Bases and adapters from the Hub: fetched, checked, converted, ready without the network."""
