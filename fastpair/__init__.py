"""fastpair: learn how similar two things are from good and bad pairs, then score by the million."""
