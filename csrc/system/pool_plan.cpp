#include <algorithm>
#include <sstream>

#include "base/check.h"
#include "system/topology.h"

namespace kt {
namespace {

std::string list_ids(const std::vector<NumaNode>& nodes) {
  std::string text;
  for (const NumaNode& node : nodes) text += (text.empty() ? "" : ", ") + std::to_string(node.id);
  return text;
}

std::vector<NumaNode> select_nodes(const Topology& topology, int num_nodes,
                                   const std::vector<int>& node_ids,
                                   std::vector<std::string>& warnings) {
  const int available = static_cast<int>(topology.nodes.size());
  std::vector<NumaNode> selected;
  for (const int id : node_ids) {
    const auto same_id = [id](const NumaNode& node) { return node.id == id; };
    const auto node = std::find_if(topology.nodes.begin(), topology.nodes.end(), same_id);
    KT_CHECK(node != topology.nodes.end(),
             "NUMA node " << id << " is not one this process may use; the usable nodes are "
                          << list_ids(topology.nodes) << ".");
    KT_CHECK(std::none_of(selected.begin(), selected.end(), same_id),
             "NUMA node " << id << " is given twice; name every node once.");
    selected.push_back(*node);
  }
  if (!node_ids.empty()) {
    if (num_nodes != 0 && num_nodes != static_cast<int>(node_ids.size())) {
      warnings.push_back(std::to_string(num_nodes) + " NUMA nodes asked for, but " +
                         std::to_string(node_ids.size()) + " named: the named ones are used.");
    }
    return selected;
  }
  if (num_nodes > available) {
    warnings.push_back(std::to_string(num_nodes) + " NUMA nodes asked for, but there are " +
                       std::to_string(available) + ": using " + std::to_string(available) + ".");
  }
  const int count = num_nodes == 0 ? available : std::min(num_nodes, available);
  selected.assign(topology.nodes.begin(), topology.nodes.begin() + count);
  return selected;
}

// Gives out `count` more threads, each to the node that has the most room per thread it already has
// (Sainte-Lague: room / (2 * threads + 1)), so that the shares are proportional and ties go to the
// first node. A node takes at most its room.
void spread(int count, const std::vector<int>& room, std::vector<int>& threads) {
  for (; count > 0; --count) {
    int best = -1;
    for (int i = 0; i < static_cast<int>(room.size()); ++i) {
      if (threads[i] >= room[i]) continue;
      if (best < 0 ||
          int64_t{room[i]} * (2 * threads[best] + 1) > int64_t{room[best]} * (2 * threads[i] + 1)) {
        best = i;
      }
    }
    if (best < 0) return;
    ++threads[best];
  }
}

// Threads per node: every node one, cores in proportion, then hyper-threads in proportion.
std::vector<int> cut_threads(int num_threads, const std::vector<NumaNode>& nodes) {
  std::vector<int> cores;
  std::vector<int> siblings;
  int num_cores = 0;
  for (const NumaNode& node : nodes) {
    cores.push_back(node.num_cores);
    siblings.push_back(static_cast<int>(node.cpus.size()) - node.num_cores);
    num_cores += node.num_cores;
  }
  std::vector<int> threads(nodes.size(), 1);
  spread(std::min(num_threads, num_cores) - static_cast<int>(nodes.size()), cores, threads);
  std::vector<int> extra(nodes.size(), 0);
  spread(num_threads - num_cores, siblings, extra);
  for (size_t i = 0; i < nodes.size(); ++i) threads[i] += extra[i];
  return threads;
}

}  // namespace

int PoolPlan::num_threads() const {
  int threads = 0;
  for (const Node& node : nodes) threads += static_cast<int>(node.cpus.size());
  return threads;
}

PoolPlan plan_pool(const Topology& topology, int num_threads, int num_nodes,
                   const std::vector<int>& node_ids) {
  KT_CHECK(num_threads >= 0, "The number of threads is "
                                 << num_threads
                                 << "; give 0 for all physical cores, or a positive number.");
  KT_CHECK(num_nodes >= 0, "The number of NUMA nodes is "
                               << num_nodes << "; give 0 for all nodes, or a positive number.");
  KT_CHECK(!topology.nodes.empty(), "The topology has no NUMA node; detect_topology() gives one.");
  PoolPlan plan;
  std::vector<NumaNode> nodes = select_nodes(topology, num_nodes, node_ids, plan.warnings);

  Topology used = topology;
  used.nodes = nodes;
  int num_cpus = 0;
  int num_cores = 0;
  for (const NumaNode& node : nodes) {
    num_cpus += static_cast<int>(node.cpus.size());
    num_cores += node.num_cores;
  }
  if (num_threads == 0) num_threads = used.num_cores();
  if (num_threads > num_cpus) {
    plan.warnings.push_back(std::to_string(num_threads) + " threads asked for, but " +
                            std::to_string(num_cpus) + " CPUs are usable: using " +
                            std::to_string(num_cpus) + ".");
    num_threads = num_cpus;
  }
  if (topology.cpu_quota > 0 && num_threads > std::max(1.0, topology.cpu_quota)) {
    std::ostringstream warning;
    warning << num_threads << " threads on a control-group quota of " << topology.cpu_quota
            << " CPUs will be throttled: ask for at most " << used.num_cores() << ".";
    plan.warnings.push_back(warning.str());
  }
  if (num_threads < static_cast<int>(nodes.size())) {
    plan.warnings.push_back(std::to_string(num_threads) + " threads cannot serve " +
                            std::to_string(nodes.size()) + " NUMA nodes: using the first " +
                            std::to_string(num_threads) + ".");
    nodes.resize(num_threads);
  }

  // Under a quota smaller than the node the container shares all its CPUs with others: pinned to
  // the first ones, two such containers would queue on the same cores while the rest are idle.
  const bool pin = nodes.size() > 1 || topology.cpu_quota == 0 || topology.cpu_quota >= num_cores;
  const std::vector<int> threads = cut_threads(num_threads, nodes);
  for (size_t i = 0; i < nodes.size(); ++i) {
    PoolPlan::Node node;
    node.id = nodes[i].id;
    node.bind_memory = topology.can_bind && nodes[i].has_memory;
    node.cpus.assign(nodes[i].cpus.begin(), nodes[i].cpus.begin() + threads[i]);
    if (!pin) node.cpus.assign(threads[i], -1);
    plan.nodes.push_back(std::move(node));
  }
  return plan;
}

}  // namespace kt
