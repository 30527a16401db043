"""Data modules and the sources behind them; nothing is imported before it is asked for."""
