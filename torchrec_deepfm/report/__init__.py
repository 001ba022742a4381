"""HTML reports and the figures in them; loads no torch."""
