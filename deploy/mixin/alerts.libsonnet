{
  local c = $._config,
  local alert(name, severity, wait, expr, summary, description) = {
    alert: name,
    expr: expr,
    [if wait != null then 'for']: wait,
    labels: { severity: severity },
    annotations: { summary: summary, description: description },
  },
  local quantile(q, metric, by, selector) =
    'histogram_quantile(%s, sum by (%s, le) (rate(%s_bucket{%s}[5m])))' % [q, by, metric, selector],

  prometheusAlerts+:: {
    groups+: [
      {
        name: 'warren-control-plane',
        rules: [
          alert(
            'WarrenTargetDown', 'critical', '2m',
            'up{%s} == 0 or up{%s} == 0' % [c.managerSelector, c.agentSelector],
            'A Warren process cannot be scraped',
            '{{ $labels.job }} on {{ $labels.instance }} has not answered for two minutes. Containers go on without it.',
          ),
          alert(
            'WarrenNoLeader', 'critical', '1m',
            'sum(warren_raft_is_leader{%s}) == 0' % c.managerSelector,
            'No manager leads',
            'Nothing is scheduled and nothing can be changed. See /ready of the managers.',
          ),
          alert(
            'WarrenQuorumLost', 'critical', '1m',
            'warren_raft_quorum_ok{%s} == 0' % c.managerSelector,
            'A manager knows of no leader with a majority',
            '{{ $labels.instance }} reaches too few of the managers.',
          ),
          alert(
            'WarrenLeaderFlaps', 'warning', null,
            'increase(warren_raft_leader_changes_total{%s}[15m]) > 3' % c.managerSelector,
            'The leader changes often',
            '{{ $value | humanize }} changes in 15 minutes. Slow disks and lossy networks are the usual causes.',
          ),
          alert(
            'WarrenLogSyncSlow', 'warning', '10m',
            quantile('0.99', 'warren_raft_log_sync_duration_seconds', 'instance', c.managerSelector) + ' > %g' % c.logSyncSlow,
            "A manager's disk is slow",
            'One in a hundred writes of the Raft log on {{ $labels.instance }} takes {{ $value | humanizeDuration }}.',
          ),
          alert(
            'WarrenApiFails', 'warning', '5m',
            |||
              sum by (method) (rate(warren_api_requests_total{%(s)s, status=~"INTERNAL|UNKNOWN|UNAVAILABLE|DATA_LOSS"}[5m]))
                / sum by (method) (rate(warren_api_requests_total{%(s)s}[5m])) > %(share)g
            ||| % { s: c.managerSelector, share: c.apiFailing },
            'API calls fail',
            '{{ $value | humanizePercentage }} of the calls of {{ $labels.method }} fail, and not by the fault of who calls.',
          ),
        ],
      },
      {
        name: 'warren-nodes',
        rules: [
          alert(
            'WarrenNodeDown', 'critical', '2m',
            'warren_nodes_total{%s, status="down"} > 0' % c.managerSelector,
            'Nodes are down',
            '{{ $value }} nodes have not been heard of. Their containers are placed elsewhere where that is possible.',
          ),
          alert(
            'WarrenNodeCondition', 'warning', '2m',
            'warren_node_condition{%s} == 1' % c.managerSelector,
            'Something is wrong with a node',
            '{{ $labels.node }}: {{ $labels.condition }}. `warren node inspect {{ $labels.node }}` says why. Without containerd, disk space or its network a node is given no containers.',
          ),
          alert(
            'WarrenTelemetryStale', 'warning', '2m',
            'warren_telemetry_age_seconds{%s} > %g' % [c.managerSelector, c.telemetryStale],
            'A node sends no telemetry',
            'The latest from {{ $labels.node }} is {{ $value | humanizeDuration }} old. Its counts arrive when it is back.',
          ),
          alert(
            'WarrenProbesDown', 'warning', '5m',
            'warren_probe_up{%s} == 0' % c.nodeSelector,
            'A node times nothing in the kernel',
            'The {{ $labels.probe }} probes of {{ $labels.node }} are not attached: `warren node inspect {{ $labels.node }}` says why.',
          ),
          alert(
            'WarrenProbeEventsLost', 'warning', '5m',
            'sum by (node, probe, reason) (rate(warren_probe_events_lost_total{%s}[5m])) > 0' % c.nodeSelector,
            'Probes lose events',
            'On {{ $labels.node }}, {{ $labels.probe }}, {{ $labels.reason }}: {{ $value | humanize }} a second.',
          ),
          alert(
            'WarrenMetricOverflow', 'warning', '5m',
            'count by (instance) ({otel_metric_overflow="true", %s} or {otel_metric_overflow="true", %s}) > 0'
            % [c.managerSelector, c.agentSelector],
            'A metric has too many series',
            'Some of what {{ $labels.instance }} measures is in a series of no labels but otel_metric_overflow.',
          ),
          alert(
            'WarrenExportFails', 'warning', '10m',
            |||
              rate(warren_otlp_exports_total{result="failure"}[10m]) > 0
                unless on (instance, signal) rate(warren_otlp_exports_total{result="success"}[10m]) > 0
            |||,
            'Telemetry does not reach the collector',
            'No {{ $labels.signal }} of {{ $labels.instance }} have been taken for ten minutes.',
          ),
        ],
      },
      {
        name: 'warren-containers',
        rules: [
          alert(
            'WarrenContainersPending', 'warning', '5m',
            'warren_scheduling_pending{%s} > 0' % c.managerSelector,
            'Containers find no node',
            '{{ $value }} wait. `warren service ps` says what each node lacks.',
          ),
          alert(
            'WarrenServiceShort', 'warning', '5m',
            |||
              warren_service_containers{%(s)s, state="ready"}
                < on (instance, service) group_left () warren_service_containers{%(s)s, state="desired"}
            ||| % { s: c.managerSelector },
            'A service has too few containers',
            '{{ $labels.service }} has {{ $value }} that are ready, for five minutes. `warren service ps {{ $labels.service }}` says why.',
          ),
          alert(
            'WarrenContainersRestart', 'warning', null,
            'sum by (service) (increase(warren_container_restarts_total{%s}[15m])) > 5' % c.managerSelector,
            'A service keeps failing',
            '{{ $labels.service }} was replaced {{ $value | humanize }} times in 15 minutes.',
          ),
          alert(
            'WarrenOutOfMemory', 'warning', null,
            'sum by (service) (increase(warren_container_out_of_memory_total{%s}[15m])) > 0' % c.managerSelector,
            'Containers run out of memory',
            'The kernel ended {{ $value | humanize }} of {{ $labels.service }} in 15 minutes: it needs a higher memory limit, or less memory.',
          ),
          alert(
            'WarrenStartSlow', 'warning', '10m',
            quantile('0.99', 'warren_container_start_duration_seconds', 'node', c.nodeSelector) + ' > %g' % c.startSlow,
            'Containers start slowly',
            'On {{ $labels.node }} one in a hundred takes {{ $value | humanizeDuration }} from the runtime to its first instruction.',
          ),
          alert(
            'WarrenSigtermIgnored', 'info', null,
            'sum by (node) (increase(warren_container_sigterm_ignored_total{%s}[1h])) > 0' % c.nodeSelector,
            'Containers ignore their stop signal',
            'The first process of {{ $value | humanize }} containers on {{ $labels.node }} had no handler for it: each waited for SIGKILL. An init or `exec` in its entry point helps.',
          ),
        ],
      },
      {
        name: 'warren-dns',
        rules: [
          alert(
            'WarrenDnsFails', 'warning', '5m',
            |||
              sum by (node, service) (rate(warren_dns_failures_total{%(s)s, reason!="nxdomain"}[5m]))
                / sum by (node, service) (rate(warren_dns_queries_total{%(s)s}[5m])) > %(share)g
            ||| % { s: c.nodeSelector, share: c.dnsFailing },
            'DNS queries fail',
            '{{ $value | humanizePercentage }} of what {{ $labels.service }} asks on {{ $labels.node }} is not answered, or with an error.',
          ),
          alert(
            'WarrenDnsSlow', 'warning', '10m',
            quantile('0.99', 'warren_dns_query_duration_seconds', 'node, service', c.nodeSelector) + ' > %g' % c.dnsSlow,
            'DNS answers are slow',
            'One in a hundred for {{ $labels.service }} on {{ $labels.node }} takes {{ $value | humanizeDuration }}.',
          ),
        ],
      },
    ],
  },
}
