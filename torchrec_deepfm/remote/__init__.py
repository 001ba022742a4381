"""Object stores and other places with an address (``s3://...``): what commands read there, and what they write."""
