"""Several finished runs side by side: their metrics, curves, costs and configs. No torch."""
