"""Students between machines and people: cards, checks of foreign files, pull and publish. No tensors."""
