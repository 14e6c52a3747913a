"""What the service remembers: tables, the database behind them, and one store for each noun."""
