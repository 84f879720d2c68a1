"""Every system of the paper, measured under one set of counting rules, beside the published figures."""
