"""Systems beside each other under one counting: measured ones, published ones, anyone's; scored by AUP and drawn."""
