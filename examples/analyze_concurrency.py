# 分析并发效率的Python脚本示例
import json
import matplotlib.pyplot as plt

def analyze_concurrency_efficiency():
    concurrency_levels = [1, 5, 10, 20, 50, 100, 200]
    throughputs = []
    
    for c in concurrency_levels:
        with open(f'concurrency_{c}.json', 'r') as f:
            data = json.load(f)
            throughputs.append(data['request_throughput'])
    
    # 计算并发效率
    efficiency = [t/c for t, c in zip(throughputs, concurrency_levels)]
    
    # 绘制图表
    plt.figure(figsize=(12, 5))
    
    plt.subplot(1, 2, 1)
    plt.plot(concurrency_levels, throughputs, 'b-o')
    plt.xlabel('并发度')
    plt.ylabel('吞吐量 (req/s)')
    plt.title('吞吐量 vs 并发度')
    plt.grid(True)
    
    plt.subplot(1, 2, 2)
    plt.plot(concurrency_levels, efficiency, 'r-o')
    plt.xlabel('并发度')
    plt.ylabel('并发效率 (req/s per concurrency)')
    plt.title('并发效率 vs 并发度')
    plt.grid(True)
    
    plt.tight_layout()
    plt.savefig('concurrency_analysis.png')
    plt.show()
    
    # 找到最优并发度
    max_efficiency_idx = efficiency.index(max(efficiency))
    optimal_concurrency = concurrency_levels[max_efficiency_idx]
    
    print(f"🎯 最优并发度: {optimal_concurrency}")
    print(f"📊 最大吞吐量: {max(throughputs):.2f} req/s")
    print(f"⚡ 最高效率: {max(efficiency):.3f} req/s per concurrency")

analyze_concurrency_efficiency()
