"""How good a frozen backbone is: protocols, the sets they take, and what stands beside them."""
