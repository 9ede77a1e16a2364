//! weft-carrier
