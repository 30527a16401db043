"""Token mixers, their parts, and the contract that all of them keep."""
