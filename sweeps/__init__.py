"""The search on small models: experiments, studies, selection, and the bundle they end in."""
