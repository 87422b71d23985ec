"""Tests. A package, so that test files can import `tests.models`."""
