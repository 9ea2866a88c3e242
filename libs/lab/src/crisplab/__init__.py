"""crisplab: a throwaway node, registry and images, shared by the demo, the tests and the benches."""
