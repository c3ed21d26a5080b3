"""Who answers better: samples, judges, matches between them, win-rates with their intervals."""
