//! Containers.

use warren_proto::v1;

use crate::{
    client::{ClientArguments, all_pages},
    error::Error,
};

pub(crate) async fn get(client: &ClientArguments, container: String) -> Result<v1::Container, Error> {
    let request = v1::GetContainerRequest { container };
    Ok(client.containers().await?.get_container(request).await?.into_inner().container.unwrap_or_default())
}

pub(crate) fn has_ended(container: &v1::Container) -> bool {
    status(container).state() >= v1::ContainerState::Complete
}

pub(crate) fn status(container: &v1::Container) -> v1::ContainerStatus {
    container.status.clone().unwrap_or_default()
}

/// All containers, page by page, and the revision that a watch which is to miss none of their changes begins with.
pub(crate) async fn list(
    client: &ClientArguments,
    service: String,
    node: String,
) -> Result<(Vec<v1::Container>, u64), Error> {
    let mut client = client.containers().await?;
    let mut revision = None;
    let containers = all_pages(async |page_token| {
        let (service, node) = (service.clone(), node.clone());
        let request = v1::ListContainersRequest { service, node, page_size: 0, page_token };
        let page = client.list_containers(request).await?.into_inner();
        // The first page's: what changed while the others were read is news.
        revision.get_or_insert(page.revision);
        Ok((page.containers, page.next_page_token))
    })
    .await?;
    Ok((containers, revision.unwrap_or_default()))
}

/// A state's name without the enumeration's.
pub(crate) fn state_name(state: v1::ContainerState) -> String {
    state.as_str_name().trim_start_matches("CONTAINER_STATE_").to_ascii_lowercase()
}

/// A container's name: its service and slot.
pub(crate) fn name(container: &v1::Container) -> String {
    name_of(&container.service_name, container.slot)
}

pub(crate) fn name_of(service: &str, slot: u32) -> String {
    if slot == 0 { service.to_owned() } else { format!("{service}-{slot}") }
}
