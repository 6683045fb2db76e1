"""The family under PyTorch's own test machinery: OpInfo, gradcheck, composite compliance, and every kind of derivative."""
