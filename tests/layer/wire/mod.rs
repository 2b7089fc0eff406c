//! Requests and responses on real sockets, byte for byte.

mod replays;
mod requests;
mod streams;
