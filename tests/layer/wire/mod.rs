//! Requests and responses on real sockets, byte for byte.

mod framing;
mod replays;
mod requests;
mod streams;
