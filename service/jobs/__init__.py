"""Jobs: how solves run, in processes of their own, under leases."""
