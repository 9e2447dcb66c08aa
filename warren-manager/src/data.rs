//! A manager's directory: how it is made, of which version it is, and copies of what is in it.

pub mod backup;
pub mod data_dir;
pub mod formation;
