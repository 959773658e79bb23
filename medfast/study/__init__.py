"""`python -m medfast.study`: methods, seeds and initialisations under one budget, compared."""
