//! weft-lb
