"""crisplab: a throwaway node, registry and images for the demo, the tests and the benches."""
