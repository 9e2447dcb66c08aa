// What an installation may want to change: import the mixin and override `_config`.
{
  _config+:: {
    // The scrape jobs. The leading manager exports what every node's agent has measured; an agent exports its own node's.
    managerSelector: 'job="warren-manager"',
    agentSelector: 'job="warren-agent"',
    // Whose container and DNS metrics are used. With agents that observe and no manager, say $._config.agentSelector: both at
    // once would count everything twice.
    nodeSelector: self.managerSelector,

    // Seconds.
    logSyncSlow: 0.512,
    startSlow: 8,
    dnsSlow: 1,
    telemetryStale: 30,
    // Shares.
    dnsFailing: 0.05,
    apiFailing: 0.01,

    dashboardUid: 'warren-overview',
    dashboardRefresh: '10s',
  },
}
