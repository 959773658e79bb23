"""Every claim about speed, memory and error: asserted, measured beside its peers, kept as JSON."""
