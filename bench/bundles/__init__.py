"""Peers on their way to a machine without the internet: fetched, built, packed, installed."""
