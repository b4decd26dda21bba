"""Cases: points of a contract's input space, how they become tensors, and which of them must be visited."""
