//! Nodes.

use warren_proto::v1;

use crate::{
    client::{ClientArguments, all_pages},
    error::Error,
};

pub(crate) async fn list(client: &ClientArguments) -> Result<Vec<v1::Node>, Error> {
    let mut client = client.nodes().await?;
    all_pages(async |page_token| {
        let page = client.list_nodes(v1::ListNodesRequest { page_size: 0, page_token }).await?.into_inner();
        Ok((page.nodes, page.next_page_token))
    })
    .await
}
