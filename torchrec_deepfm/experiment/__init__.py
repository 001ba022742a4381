"""Plans measured on real ranks, and hardware descriptions calibrated from them."""
