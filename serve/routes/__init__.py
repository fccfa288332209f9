"""HTTP handlers, one module for each group of routes; `gateway` puts them together. They hold no model and no keys."""
