"""One mechanism, one file: equation, reference, parallel form, state and step."""
