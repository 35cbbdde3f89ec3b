"""Making models that speculate well."""
