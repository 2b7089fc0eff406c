//! Settings of the layer, as its users make them.

mod answers;
mod attempts;
mod requests;
