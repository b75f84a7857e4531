"""What every operator shares: private names, choices, plans."""
