"""fastpair: learn how similar two things are from good and bad pairs, then score pairs by the hundred million."""
